"""Every error a user of promptfold can cause.

PromptfoldError
├── UsageError      a flag or an argument that cannot be used
├── TextError       a sentence that cannot be classified (empty, not valid Unicode)
│   └── LongTextError   … because it is too long
├── DataError       a data file that cannot be read, or rows in it that cannot be used
├── HubError        a model or data set that the Hugging Face hub did not give
├── ModelError      a base model that is missing, damaged or of an unsupported kind
├── AdapterError    a folder that is not an adapter, or an adapter that does not fit
├── BundleError     a folder that is not a bundle, or a bundle that does not fit
├── ParityError     an exported graph whose logits differ from PyTorch's
├── PrecisionError  a graph in another precision that scores worse than the gate allows
├── RequestError    a request to a served bundle that is refused
└── EngineError     an engine process that died or did not answer in time

Each message says what was wrong, where, and what to do next, so that it can be shown as it is: on the
command line (exit status 2) and on the page.
"""


class PromptfoldError(Exception):
    """The root: whatever promptfold raises on purpose."""


class UsageError(PromptfoldError):
    """A flag or an argument that cannot be used."""


class TextError(PromptfoldError):
    """A sentence that cannot be classified."""


class LongTextError(TextError):
    """A sentence that is too long to be classified."""


class DataError(PromptfoldError):
    """A data file that cannot be read, or rows in it that cannot be used."""


class HubError(PromptfoldError):
    """A model or data set that the Hugging Face hub did not give."""


class ModelError(PromptfoldError):
    """A base model that is missing, damaged or of an unsupported kind."""


class AdapterError(PromptfoldError):
    """A folder that is not an adapter, or an adapter that does not fit."""


class BundleError(PromptfoldError):
    """A folder that is not a bundle, or a bundle that does not fit."""


class ParityError(PromptfoldError):
    """An exported graph whose logits differ from PyTorch's by more than the tolerance."""


class PrecisionError(PromptfoldError):
    """A graph in another precision that scores worse than the gate allows."""


class RequestError(PromptfoldError):
    """A request to a served bundle that is refused.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class EngineError(PromptfoldError):
    """An engine process that died or did not answer in time."""


def is_of_tokenizers(cause: BaseException) -> bool:
    """Whether the library tokenizers raised it: a bare Exception, or a panic of its Rust code, which is not even that."""
    return type(cause) is Exception or type(cause).__name__ == "PanicException"


def first_line(cause: BaseException) -> str:
    """The first line of another library's message, or the exception's name where it has none."""
    lines = str(cause).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(cause).__name__
