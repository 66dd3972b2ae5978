"""The taxonomy of failures, each with the exit code the command line ends with.

Every message is one sentence that says what, where, and what to do; the command line prints it without a traceback.
Only `InternalError` (and any exception that is not an `LwError`) is a fault of ours and keeps its traceback.
"""

from __future__ import annotations


class LwError(Exception):
    """Base of every failure that a user can cause or mend."""

    exit_code = 2


class BadInput(LwError):
    """A file, model, dataset or flag that cannot be used as given."""


class BadPlan(LwError):
    """A plan or recipe that names an unknown site or key, an option that is not offered, or breaks a group."""


class Refused(LwError):
    """A pass or backend that will not do what was asked at a site, with the reason."""

    def __init__(self, reason: str, *, site: str | None = None) -> None:
        super().__init__(f"{site}: {reason}" if site else reason)
        self.reason, self.site = reason, site


class InfeasibleBudget(LwError):
    """A budget that no plan meets; the message says what could be met."""


class VerificationError(LwError):
    """A promise of the pass contract that the result does not keep."""


class PluginError(LwError):
    """A plugin that fails to load, clashes with another, or raises; the message names its distribution."""


class InternalError(LwError):
    """A state that cannot happen. The only error that deserves a bug report."""

    exit_code = 70
