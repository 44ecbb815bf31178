"""`apply_policy`: puts a policy in force on a pipeline, and the `Guard` that holds it there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from safegen.audit import AuditLog, AuditOptions, HmacKey, RuntimeVersions, load_key, load_signer
from safegen.audit.options import default_directory
from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.backend.conditioning import TextSeam
from safegen.backend.injection import Injection
from safegen.backend.sites import plan
from safegen.backend.standin import StandIn
from safegen.backend.watch import EncodePromptWatch, ImageWatch, LatentsWatch, PartsWatch
from safegen.bundle.store import MembraneStore
from safegen.composition import Composition, compose
from safegen.errors import MembraneError, SafegenError
from safegen.gatekeeper import Decision, Gatekeeper, Installed
from safegen.membrane.delta import pool
from safegen.membrane.file import read_with_digest
from safegen.membrane.weights import Membrane
from safegen.policy.catalogue import load_catalogue
from safegen.policy.context import checked, utc_now
from safegen.policy.load import load_policy
from safegen.policy.resolve import ResolvedPolicy, resolve
from safegen.record import Recorder
from safegen.run import Runs

logger = logging.getLogger("safegen")


def prepare(
    pipe: Any,
    policy: str | Path,
    *,
    membranes: Sequence[str | Path] = (),
    context: Mapping[str, str] | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> tuple[Backend, ResolvedPolicy, Gatekeeper]:
    """Loads everything that a policy needs on a pipeline, and checks it, without touching the pipeline.

    Args:
        pipe: The host's pipeline.
        policy: Path of a policy file, or the name of a shipped one ("strict").
        membranes: Further folders with membranes, laid out as the shipped one.
        context: What is known of every caller.
        clock: The time that exceptions are held against.

    Returns:
        The backend, the policy resolved for callers without exceptions, and the gatekeeper that decides for prompts.

    Raises:
        SafegenError: See `apply_policy`.
    """
    document = load_policy(policy)
    backend = backend_of(pipe)
    store = MembraneStore([Path(root) for root in membranes])
    paths = store.installed(backend.family)
    context = checked(context or {})
    resolved = resolve(document, load_catalogue(), available=paths.keys(), now=clock(), family=backend.family)
    rules = [rule for rule in resolved.rules if rule.uses_membrane]
    read = [_read(paths[rule.concept.id], rule.concept.id, backend) for rule in rules]
    pooled = pool([membrane for membrane, _ in read])
    installed = [Installed(*item) for item in zip(rules, pooled, (digest for _, digest in read), strict=True)]
    return backend, resolved, Gatekeeper(backend, resolved, installed, context=context, clock=clock)


def _read(path: Path, concept: str, backend: Backend) -> tuple[Membrane, str]:
    """Reads a membrane and refuses one that would not erase this concept from this model."""
    membrane, digest = read_with_digest(path)
    if membrane.concept != concept:
        raise MembraneError(
            f"{path}: this membrane erases {membrane.concept!r}, and its folder says {concept!r}; expected a membrane "
            "in the folder of its own concept. Put the right file there."
        )
    try:
        plan(membrane, backend.sites, backend.family)  # refuses here, before anything is attached
        membrane.check_acts()
    except SafegenError as error:
        raise type(error)(f"{path}: {error}") from error
    return membrane, digest


def apply_policy(
    pipe: Any,
    policy: str | Path,
    *,
    audit: str | Path | None = None,
    audit_key: HmacKey | None = None,
    audit_options: AuditOptions | None = None,
    membranes: Sequence[str | Path] = (),
    context: Mapping[str, str] | None = None,
    clock: Callable[[], datetime] = utc_now,
    composition: Composition = "runtime",
) -> Guard:
    """Puts a policy in force on a pipeline; the caller goes on calling the pipeline itself.

    Membranes are attached to the denoiser, the prompts are read where the denoiser reads them, and every prompt is
    recorded before anything is drawn. What no rule touches comes out bit for bit as before. Rules without a membrane
    for this pipeline's base family refuse the prompts that name their concept; `Guard.notices` (also logged as
    warnings of logger "safegen") says which.

    Args:
        pipe: A diffusers pipeline of a supported family.
        policy: Path of a policy file, or the name of a shipped policy ("strict", "mini-strict").
        audit: Folder of the audit log; by default `SAFEGEN_AUDIT_DIR` or the XDG state folder.
        audit_key: Key of the prompt digests; by default this machine's (`safegen.audit.load_key`).
        audit_options: Signing, anchor, redactor, sinks and rotation of the log; where it names no signer, the log is
            signed with this machine's key (`safegen.audit.load_signer`).
        membranes: Further folders with membranes (`<root>/<family>/<concept>/membrane.safetensors`).
        context: What is known of every caller, such as a tenant: what the policy's exceptions are matched on.
            `safegen.request_context` adds to it per request; `task` says what kind of generation is run.
        clock: The time that exceptions are held against, with its zone.
        composition: `runtime` opens membranes per row, as far as each prompt asks. `static` merges them once, for every
            row; refused unless every rule that erases is fixed (`transport: {score: always, guidance: both}`). `auto`
            merges where `static` would be accepted. `Guard.composition` and the audit say which it is.

    Returns:
        The guard: a context manager; `remove()` takes everything off.

    Raises:
        PolicyError: The policy is missing or wrong; all faults at once.
        UnsupportedBackendError: Nothing on `pipe` that safegen can guard.
        UsageError: The context holds something else than texts, or an unknown task.
        BundleError, MembraneError: A membrane is missing, damaged, or for another base model.
        AlreadyAppliedError: A policy is in force on this denoiser already.
        UsageError: No such composition, or `static` for a policy that opens membranes by prompt.
        AttestationError: `static`, and the weights' number format is too coarse for the membranes.
        AuditError: The log cannot be written.
    """
    backend, resolved, gatekeeper = prepare(pipe, policy, membranes=membranes, context=context, clock=clock)
    injection = Injection(
        backend.denoiser, backend.sites, [item.membrane for item in gatekeeper.installed], backend.family
    )
    compose(injection, gatekeeper, composition)
    log = AuditLog.open(
        audit if audit is not None else default_directory(),
        key=audit_key or load_key(),
        text=resolved.audit.text,
        durable=resolved.mode == "enforce",
        runtime=_versions(),
        options=_signed(audit_options or AuditOptions()),
    )
    try:
        guard = Guard(pipe, backend, resolved, gatekeeper, injection, log)
    except BaseException:
        log.close()
        raise
    for notice in guard.notices:
        logger.warning(notice)
    return guard


def _signed(options: AuditOptions) -> AuditOptions:
    return options if options.signer is not None else replace(options, signer=load_signer())


def _versions() -> RuntimeVersions:
    import diffusers
    import torch

    return RuntimeVersions(torch=torch.__version__, diffusers=diffusers.__version__)


class Guard:
    """A policy in force on one pipeline. Use `apply_policy`.

    Attributes:
        policy: The policy, resolved for the pipeline's base family.
        composition: How its membranes act: opened per row (`runtime`), or merged for every row (`static`).
    """

    def __init__(
        self,
        pipe: Any,
        backend: Backend,
        policy: ResolvedPolicy,
        gatekeeper: Gatekeeper,
        injection: Injection,
        log: AuditLog,
    ) -> None:
        """Attaches everything; on an error nothing stays attached."""
        self.policy = policy
        self.composition: Literal["runtime", "static"] = "static" if injection.merged else "runtime"
        self._gatekeeper = gatekeeper
        self._injection = injection
        self._log = log
        self._text = TextSeam(backend)
        self._recorder = Recorder(log, policy, gatekeeper, injection, family=backend.family, source=_source(pipe))
        self._runs = Runs(backend, gatekeeper, injection, self._text, self._recorder)
        self._watched = hasattr(pipe, "encode_prompt")
        self._parts = PartsWatch(pipe, backend.parts)
        self._watches: list[StandIn] = []
        if self._watched:
            self._watches.append(EncodePromptWatch(pipe, self._parts, self._text, self._runs.prove, backend.returned))
        if hasattr(pipe, "prepare_latents"):
            self._watches.append(LatentsWatch(pipe, self._text))
        if pipe.vae is not None:
            self._watches.append(ImageWatch(pipe, self._runs.drawn))
        self._state: Literal["applied", "removed"] = "applied"
        try:
            self._attach()
            self._recorder.applied()
        except BaseException:
            self._detach()
            raise

    def _attach(self) -> None:
        if self.policy.mode == "disabled":
            return
        self._injection.attach(self._runs.before, self._runs.after, self._runs.failed)
        # Where no `encode_prompt` can be watched, the text encoder's own calls are the moment to look at all parts.
        self._text.attach(self._runs.prove if self._watched else lambda: self._runs.prove(self._parts.replaced()))
        for watch in self._watches:
            watch.attach()

    def _detach(self) -> None:
        if self._injection.attached:
            self._injection.detach()
        self._text.detach()
        for watch in self._watches:
            watch.detach()

    @property
    def notices(self) -> tuple[str, ...]:
        """What the person who applies the policy should read: rules that lack a membrane, membranes not calibrated."""
        return (*self.policy.notices, *self._gatekeeper.notices)

    @property
    def audit_path(self) -> Path:
        """The segment file of the audit log that this process writes."""
        return self._log.path

    @property
    def degraded(self) -> bool:
        """Whether records were lost: only in mode `observe` with `on_failure: degrade`, elsewhere runs are refused."""
        return self._recorder.degraded

    @property
    def removed(self) -> bool:
        """Whether the policy has been taken off."""
        return self._state == "removed"

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """Says what the policy decides for prompts, without drawing and without recording.

        Args:
            prompts: Any number of texts.

        Returns:
            One decision per prompt.
        """
        # Announced, so that a run in progress does not take them for its own.
        token = self._text.announce([(prompt,) for prompt in prompts])
        try:
            return self._gatekeeper.decide_texts(prompts)
        finally:
            self._text.end_announcement(token)

    def remove(self) -> None:
        """Takes the policy off: the pipeline is as before, bit for bit. Does nothing the second time.

        Raises:
            AttestationError: Something else has replaced an attachment; nothing is taken off then.
            AuditWriteError: The removal could not be recorded (the pipeline is as before nevertheless).
        """
        if self._state == "removed":
            return
        self._detach()
        self._state = "removed"
        try:
            self._recorder.removed()
        finally:
            self._log.close()

    def __enter__(self) -> Self:
        """Returns the guard."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes the policy."""
        self.remove()


def _source(pipe: Any) -> str:
    """Returns where the pipeline was loaded from, for the record: a hub id, or the last part of a folder's path."""
    return Path(str(pipe.config.get("_name_or_path") or type(pipe).__name__)).name
