"""What can go wrong outside us. Expected refusals are values (`solver.Refusal`), not exceptions.

TangramError
├── BadInput            a request, report or file that we cannot read; says what was wanted and found
└── KubeError           the API server did not do what we asked
    ├── Refused         it answered 4xx: definitely not done
    │   ├── NotFound    404
    │   ├── Conflict    409: it changed meanwhile, or a precondition (uid, resourceVersion) failed
    │   └── Gone        410: the watch or list must start anew
    └── Unknown         timeout, reset or 5xx: it may have been done
"""


class TangramError(Exception):
    """Anything we raise on purpose."""


class BadInput(TangramError):
    """Input from outside that cannot be read; the message is for its sender."""


class KubeError(TangramError):
    """A call to the API server that did not succeed."""


class Refused(KubeError):
    """The API server answered 4xx: what we asked for was definitely not done."""


class NotFound(Refused):
    """404: the object does not exist."""


class Conflict(Refused):
    """409: the object changed meanwhile, or a uid or resourceVersion precondition failed."""


class Gone(Refused):
    """410: the resourceVersion is too old, list again."""


class Unknown(KubeError):
    """Timeout, connection reset or 5xx: the call may have been carried out."""
