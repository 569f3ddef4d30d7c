"""Why a hub model could not be had: one sentence, ending with a way out."""

from __future__ import annotations


def explain_hub_error(name: str, revision: str | None, error: BaseException) -> str:
    """Turn whatever the loader raised for a hub id into one sentence that a user can act on."""
    from huggingface_hub import errors as hub

    chain = error_chain(error)

    def raised(*kinds: str) -> bool:
        # By name, because older versions of the hub's client lack some of them.
        classes = tuple(getattr(hub, kind) for kind in kinds if hasattr(hub, kind))
        return any(isinstance(each, classes) for each in chain)

    model = f"model {name!r}"
    url = f"https://huggingface.co/{name}"
    elsewhere = "download the folder elsewhere and pass its path, or use --model shapes-sd3"
    status = next((code for each in chain if (code := _status(each)) is not None), None)
    if raised("GatedRepoError") or status == 403:
        return (
            f"{model} is gated: accept its licence at {url} and log in with `hf auth login`, "
            f"or {elsewhere}"
        )
    if raised("RevisionNotFoundError"):
        return f"{model} has no revision {revision!r}: look it up at {url}/tree/main"
    if raised("HFValidationError"):
        return f"{model} is not a valid hub id: expected 'owner/name'"
    if raised("RepositoryNotFoundError") or status in (401, 404):
        return (
            f"{model} does not exist on the hub or is private: check the spelling at {url}, log in "
            f"with `hf auth login` if it is yours, or {elsewhere}"
        )
    if raised("OfflineModeIsEnabled"):
        return f"{model} is not in the cache and HF_HUB_OFFLINE is set: unset it, or {elsewhere}"
    if status is not None:
        return f"the hub answered {status} for {model}: try again later, or {elsewhere}"
    if any(_is_network(each) for each in chain) or raised("LocalEntryNotFoundError"):
        return f"the hub cannot be reached for {model}: check the connection, or {elsewhere}"
    if "safetensors" in str(error):
        return f"{model} has no safetensors weights ({first_line(error)}): {elsewhere}"
    return f"{model} cannot be loaded ({first_line(error)}): {elsewhere}"


def error_chain(error: BaseException | None) -> list[BaseException]:
    """The error and all that led to it: diffusers re-raises hub errors as a plain OSError."""
    chain: list[BaseException] = []
    while error is not None and not any(error is each for each in chain):
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: BaseException) -> bool:
    # By class name: the client moved from requests to httpx and on, and we depend on none of them.
    names = {each.__name__ for each in type(error).__mro__}
    known = {"ConnectError", "NetworkError", "TimeoutException", "ConnectionError", "gaierror"}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(names & known)
