"""Whether there is a checkpoint where one is named, looked for before torch and transformers are imported."""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_checkpoint"]


def find_checkpoint(path: str, flag: str = "--model") -> None:
    """Look for a folder, or for a config on the hub; what is in it is read by those who load it.

    Args:
        path: What ``from_pretrained`` takes, such as llava-hf/llava-onevision-qwen2-7b-ov-hf.
        flag: Where it was named, for the message.

    Raises:
        OSError: There is neither.
    """
    if Path(path).is_dir():
        return
    import huggingface_hub

    try:
        huggingface_hub.hf_hub_download(path, "config.json")
    except (OSError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise OSError(
            f"there is no folder {path} here, and the hub does not give its config ({cause}). Expected of {flag}: the "
            "folder of a checkpoint, or an address on the hub, which needs the network where it was not fetched before"
        ) from error
