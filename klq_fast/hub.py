"""The Hugging Face hub: whether it answers, and what to say of a name that is not here when it does not."""

import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session

from .config import InputError

SECONDS = 5.0


class HubError(InputError):
    """A name of the hub that is not in this machine's cache, while the hub does not answer."""


@cache
def hub_answers() -> bool:
    """Whether the hub (or the mirror that HF_ENDPOINT names) answers; asked once, for at most 5 s.

    Without the question each file asked for costs 23 s of retries, and a run asks for a dozen. HF_HUB_OFFLINE=1 is no.
    """
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # whatever the library of the day raises for a host that is not there
            get_session().head(constants.ENDPOINT, timeout=SECONDS)  # any status is an answer
            answered.set()

    # In a thread: looking up a name in a network without one can take a minute, which no timeout of a request ends.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()


def only_here(name: str) -> bool:
    """Whether a model or dataset is to be read from this machine alone: a folder, or the cache if the hub is silent."""
    return Path(name).exists() or not hub_answers()


def not_here(option: str, name: str) -> HubError:
    return HubError(
        f"--{option} {name}: there is no such folder, it is not in this machine's cache, and the hub "
        f"({constants.ENDPOINT}) does not answer; where it does, `{download(option, name)}` "
        f"makes a folder to give here: --{option} FOLDER"
    )


def download(option: str, name: str, folder: str = "FOLDER") -> str:
    """The command that brings a model or dataset into a folder."""
    return f"hf download {'--repo-type dataset ' if option == 'dataset' else ''}{name} --local-dir {folder}"
