"""Names of the files in a run's folder."""

ADAPTER_FILE = "adapter.safetensors"  # ALoRE, MLAE: adapters and classifier
MODEL_FILE = "model.safetensors"  # linear, full: the whole model's state dict
CONFIG_FILE = "config.json"  # the settings, the classes, the input
LOG_FILE = "log.jsonl"  # one JSON object an epoch
CHECKPOINT_FILE = "checkpoint.pt"  # what --resume needs
RESULT_FILE = "result.json"  # there once the run has finished
PLOT_FILE = "curves.png"
