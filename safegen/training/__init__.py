"""Training of membranes: SPM's erasing loss with latent anchoring, data-free."""
