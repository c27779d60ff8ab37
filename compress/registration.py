"""Make AutoConfig, and through it AutoModelForCausalLM, open artifacts without remote code.

This may be imported while transformers is itself being imported, so it takes no more of it than its config classes;
``loader.py``, which needs the models too, is imported when the first artifact is opened.
"""

from typing import Any

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


class CompressConfig(PretrainedConfig):
    """Makes the config class of the artifact's base architecture."""

    model_type = "compress"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration; ``base_model_type`` says of which architecture."""
        from compress.loader import classes

        return classes(config_dict["base_model_type"])[0].from_dict(config_dict, **kwargs)


AutoConfig.register(CompressConfig.model_type, CompressConfig, exist_ok=True)
