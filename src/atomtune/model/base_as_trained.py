"""Base as trained: an adapter answers on the weights that it was trained on, and these may have been quantized."""

from collections.abc import Callable, Sequence

from atomtune.choices import Dtype, Quantize
from atomtune.errors import BadSettings
from atomtune.extras import refuse_missing
from atomtune.model.adapter_folder import AdapterMetadata
from atomtune.model.load import is_stored_quantized


def quantize_as_trained(
    base_path: str,
    trained: Sequence[Quantize | None],
    *,
    asked: Quantize | None,
    stored: bool,
    trust_remote_code: bool,
    notice: Callable[[str], None],
) -> Quantize | None:
    """How to hold the base: as --quantize says, else as the training of its adapters held it.

    trained  how, of each adapter; they answer on one base, so where they differ it is held as it is stored
    asked    --quantize
    stored   --stored_base
    Raises BadSettings where bitsandbytes is missing, or both are given.
    """
    if asked and stored:
        raise BadSettings([f"--quantize {asked} and --stored_base contradict each other: pass one of them."])
    quantized = [kind for kind in dict.fromkeys(trained) if kind]
    if asked or not quantized or is_stored_quantized(base_path, trust_remote_code=trust_remote_code):
        return asked
    if stored or len(set(trained)) > 1:
        why = "--stored_base" if stored else "not all adapters were trained that way"
        notice(
            f"the base was held in {' and '.join(quantized)} in training, but is used as it is stored here ({why}): it "
            "does not answer quite as it was trained to."
        )
        return None
    (kind,) = quantized
    refuse_missing(
        ["bitsandbytes"], extra="qlora", what=f"The base in {kind}, as in training,", otherwise="--stored_base"
    )
    notice(f"the base is held in {kind}, as it was in training; --stored_base uses its weights as they are stored.")
    return kind


def dtype_as_trained(trained: AdapterMetadata, *, quantize: Quantize | None, asked: Dtype) -> Dtype:
    """In which number format to hold the base: as --dtype says, else as training did where it is quantized likewise.

    Quantized in another one, some weights fall on another step: with float16 for bfloat16 the answers were 10,000
    times as far from the training's.
    quantize  how the base is held
    asked     --dtype
    """
    if asked == "auto" and quantize and quantize == trained.quantize:
        return trained.dtype
    return asked
