"""BADGE early exit for Hugging Face text classifiers: light bypasses, many exits, and batches that shrink as rows
leave.
"""

from importlib.util import find_spec

from .calibration.calibrate import calibrate
from .exit_table import ExitTable
from .inference.predictor import BadgePredictor
from .model.policy_badge import ExitPolicy


__version__ = "0.1.0"

__all__ = ["BadgePredictor", "ExitPolicy", "ExitTable", "calibrate"]

if find_spec("torch") is not None:  # a predictor runs where there is none
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from .inference.exit_logits import make_exit_table
    from .inference.onnx_export import export_onnx
    from .model.configuration_badge import BadgeConfig
    from .model.modeling_badge import BadgeForSequenceClassification
    from .model.pipeline_badge import BadgeTextClassificationPipeline
    from .training.convert import convert_classifier
    from .training.fine_tune import fresh_modules, parameter_groups
    from .training.lexical import fit_lexical_exit
    from .training.metrics import compute_exit_metrics
    from .training.teaching import teach_exits

    __all__ += [
        "BadgeConfig",
        "BadgeForSequenceClassification",
        "BadgeTextClassificationPipeline",
        "compute_exit_metrics",
        "convert_classifier",
        "export_onnx",
        "fit_lexical_exit",
        "fresh_modules",
        "make_exit_table",
        "parameter_groups",
        "teach_exits",
    ]

    # Registering makes the Auto classes know the model where this package is installed; register_for_auto_class makes
    # save_pretrained write the code into the checkpoint, for where it is not.
    AutoConfig.register(BadgeConfig.model_type, BadgeConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(BadgeConfig, BadgeForSequenceClassification, exist_ok=True)
    BadgeConfig.register_for_auto_class()
    BadgeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
