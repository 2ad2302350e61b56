"""DeepSeek-V3 in Flax NNX: load a checkpoint, run it, generate, fine-tune, save it again.

>>> from jaxkern.models import deepseek
>>> model = deepseek.from_pretrained("DeepSeek-V3", mesh=mesh)
>>> logits = model(input_ids)
"""

from jaxkern.models.deepseek.checkpoint import from_pretrained, save_pretrained
from jaxkern.models.deepseek.config import Config, Rope
from jaxkern.models.deepseek.generate import generate
from jaxkern.models.deepseek.model import DeepseekForCausalLM, RouterBias

__all__ = ["Config", "DeepseekForCausalLM", "Rope", "RouterBias", "from_pretrained", "generate", "save_pretrained"]
