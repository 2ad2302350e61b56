"""DeepSeek-V3 in Flax NNX: load a checkpoint, run it, generate, fine-tune, save it again.

>>> from jaxkern.models import deepseek
>>> model = deepseek.from_pretrained("DeepSeek-V3", mesh=mesh)
>>> logits = model(input_ids)
"""

from jaxkern.models.deepseek.checkpoint import from_pretrained, save_pretrained
from jaxkern.models.deepseek.config import Config, Rope
from jaxkern.models.deepseek.generate import generate
from jaxkern.models.deepseek.model import DeepseekForCausalLM, QuantizedWeight, RouterBias, WeightScale
from jaxkern.models.deepseek.training import adamw, evaluate, make_train_step

__all__ = [
    "Config",
    "DeepseekForCausalLM",
    "QuantizedWeight",
    "Rope",
    "RouterBias",
    "WeightScale",
    "adamw",
    "evaluate",
    "from_pretrained",
    "generate",
    "make_train_step",
    "save_pretrained",
]
