"""The one error tree.

    CotenantError                the root: catch this to catch all of ours
    ├── ConfigError          a file or option is wrong; names the key and what would be right
    ├── InvalidRequest       the client sent something a model cannot take
    │   └── Conflict         what is there already under this id is something else
    ├── Forbidden            the token is missing or unknown, or lacks a scope
    ├── NotFound             the model, version, job or region named does not exist
    ├── NotReady             what is named is being loaded; it can be had later
    ├── TooLarge             a stated limit on size or count is exceeded
    ├── ModelError           a model directory or file cannot be served
    ├── DeviceError          the hardware or kernel refused what was asked of it
    ├── EnvironmentProblem   a port, directory, right or library is missing or taken
    └── JournalError         a journal cannot be read (another version, damage)

Expected refusals (overload, a deadline that cannot be met) are not errors: they are
``Reject`` actions with a reason. Every message says what was wrong and what to do.
"""

from __future__ import annotations


class CotenantError(Exception):
    """Root of all errors raised by Cotenant on purpose."""


class ConfigError(CotenantError):
    """A configuration value is wrong.

    ``path`` is the dotted path of the key (``services[0].objective.latency``), empty when
    the whole document is meant.
    """

    def __init__(self, message: str, path: str = "") -> None:
        self.path = path
        super().__init__(f"{path}: {message}" if path else message)


class InvalidRequest(CotenantError):
    """The client's request does not fit the model or the protocol."""


class Conflict(InvalidRequest):
    """Under the id that the client chose there is something else already."""


class Forbidden(CotenantError):
    """The client's token is missing or unknown, or lacks the scope for what it asked."""


class NotFound(CotenantError):
    """The named thing does not exist."""


class NotReady(CotenantError):
    """The named model is being loaded."""


class TooLarge(CotenantError):
    """A stated limit on size or count is exceeded."""


class ModelError(CotenantError):
    """A model directory or file cannot be loaded or served."""


class DeviceError(CotenantError):
    """The device or the kernel refused an operation."""


class EnvironmentProblem(CotenantError):
    """The machine lacks something: a free port, a right, a library, an unused directory."""


class JournalError(CotenantError):
    """A journal cannot be read."""
