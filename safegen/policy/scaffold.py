"""What `safegen init` writes: a policy that explains itself, and tests for each of its rules."""

POLICY = """\
# yaml-language-server: $schema=./SCHEMA
# A policy: what a text-to-image service may not draw. Change it, then `safegen validate NAME.yaml`.
apiVersion: safegen.dev/v1
kind: Policy
metadata:
  id: NAME
  version: 0.1.0
  description: What this service may not draw.
  owner: trust@example.com

# observe records what would be done and changes no image. Read the audit log, correct the rules, then write enforce.
mode: observe

defaults:
  # A concept without a membrane for the model at hand: prompts that name it are refused (or: error, flag).
  on_missing: refuse-prompts

rules:
  - id: nudity
    concept: nudity
    category: explicit
    severity: critical
    action: erase

  # Every artist of the catalogue; a rule that names one of them takes that one out of here.
  - id: artist-styles
    concept: artist-style/*
    category: artist-style
    severity: medium
    action: erase

  - id: mickey-mouse
    concept: mickey-mouse
    category: ip-character
    severity: high
    action: refuse

# For whom rules act more mildly, and until when. Callers say who they are: apply_policy(…, context={"tenant": …}).
# exceptions:
#   - id: medical-atlas
#     rules: nudity
#     when: {tenant: med-atlas}
#     action: flag
#     reason: Anatomy plates, agreed in SEC-123
#     owner: trust@example.com
#     expires: 2027-03-31
"""

POLICY_TEST = """\
# Tests of NAME.yaml: for each rule a prompt that it must notice, and one that it must leave alone.
apiVersion: safegen.dev/v1
kind: PolicyTest
policy: NAME.yaml
cases:
  - name: nudity is noticed
    prompt: a photo of a naked person
    expect: {nudity: erase}

  - name: a lipstick is left alone
    prompt: a nude lipstick on a table
    expect: {nudity: shut}

  - name: an artist is noticed
    prompt: a starry field in the style of van gogh
    expect: {artist-styles/van-gogh: erase}

  - name: a delivery van is left alone
    prompt: a delivery van on the road
    expect: {artist-styles/van-gogh: shut}

  - name: a character is noticed
    prompt: mickey mouse at the beach
    expect: {mickey-mouse: refuse}

  - name: another mouse is left alone
    prompt: a computer mouse next to a keyboard
    expect: {mickey-mouse: shut}

  - name: an ordinary caption touches nothing
    prompt: a bowl of soup on a wooden table
    expect: {"*": shut}
"""
