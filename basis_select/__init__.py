"""Make a pretrained language model as small and fast as one target application allows, by basis selection.

    import basis_select as bs

    parent, tokenizer = bs.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
    task = bs.load_task("gsm8k", tokenizer)
    model = copy.deepcopy(parent)
    bs.decompose(model, task)
    bs.prune(model, keep=0.25)
    bs.heal(model, task, teacher=parent)
    bs.save(model, tokenizer, "smol-gsm8k", dtype="bfloat16")

Importing it registers the checkpoint format, so `AutoModelForCausalLM.from_pretrained` reads such a folder too.
"""

from .checkpoint.files import save
from .checkpoint.models import load
from .checkpoint.verify import verify
from .data.tasks import Task, load_task
from .decompose import decompose
from .evaluation.accuracy import compare, evaluate
from .evaluation.bench import bench
from .evaluation.profile import profile
from .evaluation.record import measure
from .evaluation.standard import evaluate_on
from .export import export
from .extend import extend
from .heal import heal
from .layers.low_rank import LowRankLinear
from .learn import learn
from .prune import prune
from .publish.push import push
from .refine import refine
from .sizes import sizes
from .statistics.derivatives import derivatives
from .stream import decompose_checkpoint
from .training.soft_labels import soft_labels
from .trim import trim
from .tune import tune

__version__ = "0.1.0"
__all__ = [
    "LowRankLinear",
    "Task",
    "bench",
    "compare",
    "decompose",
    "decompose_checkpoint",
    "derivatives",
    "evaluate",
    "evaluate_on",
    "export",
    "extend",
    "heal",
    "learn",
    "load",
    "load_task",
    "measure",
    "profile",
    "prune",
    "push",
    "refine",
    "save",
    "sizes",
    "soft_labels",
    "trim",
    "tune",
    "verify",
]
