from .checkpoint.files import save as save
from .checkpoint.models import load as load
from .checkpoint.verify import verify as verify
from .data.tasks import Task as Task
from .data.tasks import load_task as load_task
from .decompose import decompose as decompose
from .evaluation.accuracy import compare as compare
from .evaluation.accuracy import evaluate as evaluate
from .evaluation.bench import bench as bench
from .evaluation.profile import profile as profile
from .evaluation.record import measure as measure
from .evaluation.standard import evaluate_on as evaluate_on
from .export import export as export
from .extend import extend as extend
from .heal import heal as heal
from .layers.low_rank import LowRankLinear as LowRankLinear
from .learn import learn as learn
from .prune import prune as prune
from .publish.push import push as push
from .refine import refine as refine
from .sizes import sizes as sizes
from .statistics.derivatives import derivatives as derivatives
from .stream import decompose_checkpoint as decompose_checkpoint
from .training.soft_labels import soft_labels as soft_labels
from .trim import trim as trim
from .tune import tune as tune

__version__: str
