from .config import RunConfig as RunConfig
from .data.load import load_data as load_data
from .experiments import Comparison as Comparison
from .experiments import comparison_runs as comparison_runs
from .experiments import single_run as single_run
from .results.folder import RunFolder as RunFolder
from .training.runs import train_runs as train_runs
