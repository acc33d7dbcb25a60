"""The error tree of the package.

    CriaError
    +-- ConfigError    the user asked for something that cannot be done (value, rule, remedy); costs no compute
    +-- DataError      a corpus or a stored artefact is missing, torn or not what its record says
    +-- PlanError      a pruning plan does not fit the model it is applied to
    +-- NumericError   non-finite or degenerate numbers, or an eigenpair whose residual is above tolerance
    +-- WorkerError    a work item failed in a worker; names the item and carries the reason

All of them survive pickling (they take plain strings), so they can cross a process boundary.
"""


class CriaError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(CriaError):
    """The configuration cannot be carried out; the message gives the value, the rule and the remedy."""


class DataError(CriaError):
    """A corpus or a stored artefact is missing, damaged or too small."""


class PlanError(CriaError):
    """A pruning plan does not fit the model."""


class NumericError(CriaError):
    """A computation met non-finite or degenerate numbers, or did not reach its tolerance."""


class WorkerError(CriaError):
    """A work item failed in a worker."""

    def __init__(self, item: str, reason: str) -> None:
        super().__init__(item, reason)
        self.item = item
        self.reason = reason

    def __str__(self) -> str:
        """Name the item, then the reason."""
        return f"{self.item}: {self.reason}"
