"""Every error that a user of promptfold can cause.

Each message says what was wrong, where, and what to do next, so that it can be shown as it is: on the
command line (exit status 2) and on the page.
"""


class PromptfoldError(Exception):
    """The root of all errors that promptfold raises on purpose."""

    def __str__(self) -> str:
        """The message, also where it quotes what is not valid Unicode: a page could not send that."""
        return super().__str__().encode(errors="backslashreplace").decode()


class UsageError(PromptfoldError):
    """A flag or an argument that cannot be used."""


class TextError(PromptfoldError):
    """A sentence that cannot be classified: empty, or not valid Unicode."""


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
    """A request to a served bundle that is refused."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status."""

    def __reduce__(self) -> tuple[type["RequestError"], tuple[int, str]]:
        """How to pickle it; an exception's own way passes on the message alone."""
        return RequestError, (self.status, str(self))


class EngineError(PromptfoldError):
    """A process that died or did not answer in time."""


def is_of_tokenizers(cause: BaseException) -> bool:
    """Whether the library tokenizers raised it: a bare Exception, or a Rust panic, which is a BaseException."""
    return type(cause) is Exception or type(cause).__name__ == "PanicException"


def first_line(cause: BaseException) -> str:
    """The first line of another library's message, or the exception's name where it has none."""
    lines = str(cause).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(cause).__name__
