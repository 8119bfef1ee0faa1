"""Auto class: which of transformers' Auto classes loads a checkpoint.

A vision-language checkpoint may have two classes for text: the whole class, which its config names, and the text part
alone (AutoModelForCausalLM gives that one for Qwen3.5). The whole class is loaded, so that an adapter's names fit the
class that servers build, and a merged model keeps its vision tower.
"""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

#: The Auto classes and their mappings from config to model class, the simplest first.
_KNOWN: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)


def classes_for(config: Any) -> list[Any]:
    """The model classes that the Auto classes give for a config; empty if there is none."""
    found: list[Any] = []
    for _, classes_of in _KNOWN:
        if type(config) in classes_of:
            classes = classes_of[type(config)]
            found += classes if isinstance(classes, tuple) else [classes]
    return found


def auto_class(config: Any) -> Any:
    """The Auto class that gives the class in the config's `architectures`, else the first one that knows the config."""
    named = set(getattr(config, "architectures", None) or ())
    takes_config = []
    for auto, classes_of in _KNOWN:
        if type(config) not in classes_of:
            continue
        takes_config.append(auto)
        classes = classes_of[type(config)]
        classes = classes if isinstance(classes, tuple) else (classes,)
        if named & {class_.__name__ for class_ in classes}:
            return auto
    # For models with their own code, the config's auto_map names the Auto classes.
    own_code = getattr(config, "auto_map", None) or {}
    takes_config += [auto for auto, _ in _KNOWN if auto.__name__ in own_code]
    return takes_config[0] if takes_config else AutoModelForCausalLM


def is_known(config: Any) -> bool:
    """Whether transformers, or code that comes with the model, has a generative class for this config."""
    own_code = getattr(config, "auto_map", None) or {}
    return any(type(config) in classes_of or auto.__name__ in own_code for auto, classes_of in _KNOWN)
