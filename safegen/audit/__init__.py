"""The audit layer: what a policy decided and did, in a hash-chained log that can be checked afterwards.

It observes and cannot steer: it receives finished values (floats, strings, digests; never tensors) and imports neither
torch nor anything of safegen but its errors and its version.
"""

from safegen.audit.events import (
    ActionRecord,
    AttestRecord,
    ErrorRecord,
    ExceptionRecord,
    FooterRecord,
    HitRecord,
    MembraneRecord,
    ModelRecord,
    OutputRecord,
    PolicyRecord,
    PromptRecord,
    Record,
    RequestRecord,
    RuntimeRecord,
    RuntimeVersions,
    ScoreRecord,
    SegmentRecord,
    ThresholdRecord,
    TriggerRecord,
    VerdictRecord,
)
from safegen.audit.keys import HmacKey, load_key
from safegen.audit.log import AuditLog
from safegen.audit.verify import Fault, VerifyReport, raise_for_faults, read_records, verify

__all__ = [
    "ActionRecord",
    "AttestRecord",
    "AuditLog",
    "ErrorRecord",
    "ExceptionRecord",
    "Fault",
    "FooterRecord",
    "HitRecord",
    "HmacKey",
    "MembraneRecord",
    "ModelRecord",
    "OutputRecord",
    "PolicyRecord",
    "PromptRecord",
    "Record",
    "RequestRecord",
    "RuntimeRecord",
    "RuntimeVersions",
    "ScoreRecord",
    "SegmentRecord",
    "ThresholdRecord",
    "TriggerRecord",
    "VerdictRecord",
    "VerifyReport",
    "load_key",
    "raise_for_faults",
    "read_records",
    "verify",
]
