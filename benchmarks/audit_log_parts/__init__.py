"""Parts of benchmarks/audit_log.py that run in processes of their own, which import neither torch nor a benchmark."""
