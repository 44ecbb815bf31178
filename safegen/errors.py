"""Every exception that safegen raises, drawn as a tree.

::

    SafegenError                          root; `exit_code` is what the command line returns for it
    ├── UsageError                        a wrong argument, or an input file that cannot be used       exit 2
    │   ├── PromptsFileError              a prompts file that is missing, empty or unreadable
    │   └── RecipeError                   a training recipe that cannot be read, or has faults
    ├── PolicyError                       what the policy says is wrong                                exit 3
    │   ├── PolicyNotFoundError           no file, and no shipped policy, of that name
    │   ├── PolicySyntaxError             not YAML, or YAML that safegen refuses
    │   ├── PolicyValidationError         well-formed, with faults: `problems` lists all of them
    │   └── PolicyConflictError           two parts of a policy contradict each other
    ├── BundleError                       the files that a policy refers to                            exit 4
    │   ├── MembraneNotFoundError         no membrane for that concept and base family
    │   ├── DigestMismatchError           other bytes than the policy or the card pinned
    │   ├── SignatureError                a signature is missing or wrong
    │   └── BaseModelMismatchError        a membrane for another base model
    ├── MembraneError                     the content of one membrane                                  exit 4
    │   ├── FormatError                   damaged, hostile or not a membrane file
    │   └── ShapeMismatchError            factors that do not fit their site
    ├── InjectionError                    attaching to the host                                        exit 4
    │   ├── NoMatchingSiteError           zero sites matched, or fewer than the file holds
    │   ├── AlreadyAppliedError           a policy is in force on this denoiser already
    │   ├── CoverageError                 a planned site did not act during a run
    │   ├── AttestationError              the attachment is not what was planned
    │   └── UnsupportedBackendError       nothing on this object that safegen knows how to guard
    ├── AuditError                        the record                                                   exit 4
    │   ├── AuditWriteError               a record could not be made durable
    │   └── AuditChainError               the chain is broken: `seq` names the first bad record
    ├── TrainingError                     a training that cannot go on, or that changed nothing        exit 5
    └── PromptRefused                     an outcome, not a fault: carries the decision                exit 1

A message says what is wrong, where, what was expected and what was found, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


class SafegenError(Exception):
    """Root of all safegen errors."""

    exit_code: int = 5


class UsageError(SafegenError):
    """A wrong argument, or an input that cannot be used."""

    exit_code = 2


class PromptsFileError(UsageError):
    """A prompts file that is missing, empty, not UTF-8, or otherwise unreadable."""


class RecipeError(UsageError):
    """A training recipe that is missing, not YAML, or has faults; the message names all of them with their places."""


class PolicyError(SafegenError):
    """Something about the policy document is wrong."""

    exit_code = 3


class PolicyNotFoundError(PolicyError):
    """Neither a file nor a shipped policy has this name."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a policy document.

    Attributes:
        where: `file:line:column` of the fault.
        message: What is wrong, what was expected and found, and what to do.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class PolicySyntaxError(PolicyError):
    """The document is not YAML, or uses YAML that safegen refuses (aliases, tags, duplicate keys).

    Attributes:
        problems: All faults that were found before the reading ended.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PolicyValidationError(PolicyError):
    """A well-formed document with faults; `problems` lists all of them, in document order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PolicyConflictError(PolicyError):
    """Two parts of a policy contradict each other."""


class BundleError(SafegenError):
    """A file that a policy refers to is absent or not the one that was meant."""

    exit_code = 4


class MembraneNotFoundError(BundleError):
    """No membrane is installed for that concept and base family."""


class DigestMismatchError(BundleError):
    """A file has other bytes than were pinned."""


class SignatureError(BundleError):
    """A required signature is missing or wrong."""


class BaseModelMismatchError(BundleError):
    """A membrane was made for another base model than the one it is applied to."""


class MembraneError(SafegenError):
    """The content of a membrane is wrong."""

    exit_code = 4


class FormatError(MembraneError):
    """Not a membrane file: damaged, hostile, or of another format."""


class ShapeMismatchError(MembraneError):
    """Factors whose shapes do not fit each other or their site."""


class InjectionError(SafegenError):
    """Membranes could not be attached to the host, or are no longer attached as planned."""

    exit_code = 4


class NoMatchingSiteError(InjectionError):
    """Zero sites matched, or fewer than the membrane file holds."""


class AlreadyAppliedError(InjectionError):
    """Another policy is already in force on this denoiser."""


class CoverageError(InjectionError):
    """A planned site did not act during a denoiser step."""


class AttestationError(InjectionError):
    """The attachment found on the host is not the one that was planned."""


class UnsupportedBackendError(InjectionError):
    """The object has no part that safegen knows how to guard."""


class AuditError(SafegenError):
    """The audit record."""

    exit_code = 4


class AuditWriteError(AuditError):
    """A record could not be made durable; in `enforce` mode this stops the run."""


class AuditChainError(AuditError):
    """The hash chain is broken.

    Attributes:
        seq: Sequence number of the first bad record, or None where the file itself cannot be read as a log.
    """

    def __init__(self, message: str, seq: int | None = None) -> None:
        self.seq = seq
        super().__init__(message)


class TrainingError(SafegenError):
    """A training cannot go on, or its membrane changes nothing."""


class PromptRefused(SafegenError):  # noqa: N818 - an outcome, not an error
    """The policy refuses these prompts; nothing was drawn.

    Attributes:
        decision: What was decided and why, as plain values (rule id, concept, action, prompt index).
    """

    exit_code = 1

    def __init__(self, message: str, decision: Mapping[str, object]) -> None:
        self.decision = dict(decision)
        super().__init__(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'? Known: a, b, c.` for an unknown `name`; the first part only where one is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return f"{hint} Known: {shown or 'none'}."
