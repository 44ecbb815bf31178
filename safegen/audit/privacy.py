"""What the log keeps of a prompt's text: by default nothing but a keyed digest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, cast

from safegen.audit.events import ErrorRecord, HitRecord, PromptRecord, Record
from safegen.audit.keys import ALGORITHM, HmacKey
from safegen.errors import AuditWriteError, UsageError

TextPolicy = Literal["none", "redacted", "full"]

logger = logging.getLogger("safegen")


class TextKeeper:
    """Turns text into what a log may keep of it, and refuses records that hold more."""

    def __init__(self, key: HmacKey, policy: TextPolicy, redact: Callable[[str], str] | None) -> None:
        """Takes the text policy.

        Raises:
            UsageError: It is none of the three, or `redacted` without a redactor.
        """
        if policy not in ("none", "redacted", "full"):
            raise UsageError(f"audit log: expected text='none', text='redacted' or text='full', found {policy!r}")
        if policy == "redacted" and redact is None:
            raise UsageError(
                "audit log: text='redacted' needs a redactor, and none is given; pass AuditOptions(redact=…), or "
                "choose text='none'"
            )
        self._key = key
        self.policy = policy
        self._redact = redact

    @property
    def key_id(self) -> str:
        """Which key makes the HMACs."""
        return self._key.key_id

    def prompt(self, text: str, *, decoded: bool) -> PromptRecord:
        """Returns what is kept of a prompt."""
        redacted = self._redacted(text) if self.policy == "redacted" else None
        return PromptRecord(
            hmac=self._key.hmac(text),
            key_id=self.key_id,
            alg=ALGORITHM,
            chars=len(text),
            text=text if self.policy == "full" else None,
            decoded=decoded or None,
            redacted=redacted,
            redaction_failed=True if self.policy == "redacted" and redacted is None else None,
        )

    def _redacted(self, text: str) -> str | None:
        assert self._redact is not None
        try:
            redacted = cast(object, self._redact(text))
        except Exception as error:
            # Neither its message nor its traceback: both may quote the prompt.
            logger.error("audit: the redactor raised %s; the text of that prompt is dropped", type(error).__name__)
            return None
        if not isinstance(redacted, str):
            logger.error("audit: the redactor returned no text; the text of that prompt is dropped")
            return None
        return redacted

    def hit(self, rule: str, concept: str, matched: str) -> HitRecord:
        """Returns what is kept of a lexical hit."""
        return HitRecord(rule, concept, matched if self.policy == "full" else None)

    def failure(self, code: str, error: BaseException) -> ErrorRecord:
        """Returns what is kept of a failure."""
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        return ErrorRecord(code, kind, str(error) if self.policy == "full" else None)

    def check(self, record: Record) -> None:
        """Refuses a record whose text got around `prompt`, `hit` and `failure`.

        Raises:
            AuditWriteError: It holds text that this log does not keep.
        """
        if self.policy == "full":
            return
        prompts = [prompt for prompt in (record.prompt, record.negative) if prompt]
        texts = [part.text for part in (*prompts, *(record.hits or ()))] + [record.error and record.error.message]
        if self.policy == "none":
            texts += [prompt.redacted for prompt in prompts]
        if any(text is not None for text in texts):
            raise AuditWriteError(
                f"audit record {record.kind!r}: holds text of a prompt, in a log opened with text={self.policy!r}; "
                "build it with prompt(), hit() and failure() of this log"
            )
