"""BADGE early exit for Hugging Face text classifiers: light bypasses, many exits, and batches that shrink as rows
leave.
"""

from transformers import AutoConfig, AutoModelForSequenceClassification

from .calibration.calibrate import calibrate
from .exit_table import ExitTable
from .inference.exit_logits import make_exit_table
from .model.configuration_badge import BadgeConfig
from .model.modeling_badge import BadgeForSequenceClassification
from .model.pipeline_badge import BadgeTextClassificationPipeline
from .model.policy_badge import ExitPolicy
from .training.convert import convert_classifier
from .training.fine_tune import parameter_groups
from .training.lexical import fit_lexical_exit
from .training.metrics import compute_exit_metrics


__version__ = "0.1.0"

__all__ = [
    "BadgeConfig",
    "BadgeForSequenceClassification",
    "BadgeTextClassificationPipeline",
    "ExitPolicy",
    "ExitTable",
    "calibrate",
    "compute_exit_metrics",
    "convert_classifier",
    "fit_lexical_exit",
    "make_exit_table",
    "parameter_groups",
]

# Registering makes the Auto classes know the model where this package is installed; register_for_auto_class makes
# save_pretrained write the code into the checkpoint, for where it is not.
AutoConfig.register(BadgeConfig.model_type, BadgeConfig, exist_ok=True)
AutoModelForSequenceClassification.register(BadgeConfig, BadgeForSequenceClassification, exist_ok=True)
BadgeConfig.register_for_auto_class()
BadgeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
