"""The audit layer: what a policy decided and did, in a hash-chained log that can be checked afterwards.

It observes and cannot steer: it receives finished values (floats, strings, digests; never tensors) and imports neither
torch nor anything of safegen but its errors and its version.
"""

from safegen.audit.digest import Digest
from safegen.audit.events import (
    ActionRecord,
    AttestRecord,
    ErrorRecord,
    ExceptionRecord,
    FooterRecord,
    GapRecord,
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
from safegen.audit.fault import Fault
from safegen.audit.keys import HmacKey, load_key
from safegen.audit.log import AuditLog
from safegen.audit.options import AuditOptions
from safegen.audit.read import read_records
from safegen.audit.signing import Signer, load_signer
from safegen.audit.verify import VerifyReport, raise_for_faults, verify

__all__ = [
    "ActionRecord",
    "AttestRecord",
    "AuditLog",
    "AuditOptions",
    "Digest",
    "ErrorRecord",
    "ExceptionRecord",
    "Fault",
    "FooterRecord",
    "GapRecord",
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
    "Signer",
    "ThresholdRecord",
    "TriggerRecord",
    "VerdictRecord",
    "VerifyReport",
    "load_key",
    "load_signer",
    "raise_for_faults",
    "read_records",
    "verify",
]
