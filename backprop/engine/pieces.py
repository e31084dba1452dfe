"""What llama.cpp's converter must be told of a tokenizer with a SentencePiece model, and transformers does not save."""

import json
import shutil
from pathlib import Path
from typing import Any

from backprop.engine.load import HfTokenizer


def tell_converter(tokenizer: HfTokenizer, folder: Path, *, base: str) -> None:
    """Complete the tokenizer in ``folder``, which transformers saved, for the converter; not for transformers.

    Without the model, the converter refuses, or makes pieces without scores, which cut a text at other places. Without
    the rest, control tokens are plain text, and llama.cpp begins every text with a token and a space.

    Args:
        base: The base model's folder, which has the model as it was trained.
    """
    pieces = Path(base) / "tokenizer.model"
    if not pieces.is_file():
        return
    shutil.copyfile(pieces, folder / pieces.name)
    whole: Any = tokenizer.inner
    begun = whole("a")["input_ids"]
    after_control = tokenizer.tokenize(f"{whole.eos_token}a")[1].id
    path = folder / "tokenizer_config.json"
    settings = {
        **json.loads(path.read_text(encoding="utf-8")),
        "add_bos_token": begun[0] == whole.bos_token_id,
        "add_eos_token": begun[-1] == whole.eos_token_id,
        # llama.cpp does the same at the start of a text and after a control token; chats are of the latter.
        "add_prefix_space": str(whole.convert_ids_to_tokens(after_control)).startswith("▁"),
        "added_tokens_decoder": {
            str(number): {"content": token.content, "special": token.special}
            for number, token in whole.added_tokens_decoder.items()
        },
    }
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_name(tokenizer: HfTokenizer, name: str, *, base: str) -> str:
    """Give the name that the file's model must have.

    That Phi-3's control tokens swallow the white space behind them, llama.cpp knows by that name alone.
    """
    whole: Any = tokenizer.inner
    swallows = any(token.special and token.rstrip for token in whole.added_tokens_decoder.values())
    return f"{name} (phi3)" if swallows and (Path(base) / "tokenizer.model").is_file() else name
