"""Recipes: what the user asks for, as one frozen dataclass per stage.

A field is declared once, here. Its default, bounds and help serve the Python API, the command-line
flag, the YAML key and the reference. `vitcompress.cli.app` makes the flags from these classes.
"""

from vitcompress.recipe.stages import STAGES as STAGES
from vitcompress.recipe.stages import FlagSpec as FlagSpec
from vitcompress.recipe.stages import GateRecipe as GateRecipe
from vitcompress.recipe.stages import Recipe as Recipe
from vitcompress.recipe.stages import flag_specs as flag_specs
from vitcompress.recipe.student import DEFAULT_SHARE as DEFAULT_SHARE
from vitcompress.recipe.student import KINDS as KINDS
from vitcompress.recipe.student import MAX_CALIBRATION_IMAGES as MAX_CALIBRATION_IMAGES
from vitcompress.recipe.student import QUANTIZED_STORES as QUANTIZED_STORES
from vitcompress.recipe.student import TRANSFORMS as TRANSFORMS
from vitcompress.recipe.student import ModelRecipe as ModelRecipe
from vitcompress.recipe.student import PlanRecipe as PlanRecipe
from vitcompress.recipe.student import StartRecipe as StartRecipe
from vitcompress.recipe.student import StoreRecipe as StoreRecipe
from vitcompress.recipe.student import TargetRecipe as TargetRecipe
from vitcompress.recipe.training import BUILT_IN as BUILT_IN
from vitcompress.recipe.training import CPU_BATCH_SIZE as CPU_BATCH_SIZE
from vitcompress.recipe.training import DEFAULT_BATCH_SIZE as DEFAULT_BATCH_SIZE
from vitcompress.recipe.training import DEFAULT_LR as DEFAULT_LR
from vitcompress.recipe.training import DEFAULT_STEPS as DEFAULT_STEPS
from vitcompress.recipe.training import LOSS_NAMES as LOSS_NAMES
from vitcompress.recipe.training import DataRecipe as DataRecipe
from vitcompress.recipe.training import DistillRecipe as DistillRecipe
from vitcompress.recipe.training import Interval as Interval
from vitcompress.recipe.training import RunRecipe as RunRecipe
from vitcompress.recipe.training import TeacherRecipe as TeacherRecipe
from vitcompress.recipe.training import save_interval as save_interval
from vitcompress.recipe.values import flag_of as flag_of
