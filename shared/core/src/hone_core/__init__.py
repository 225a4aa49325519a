"""What every hone package uses: run folders, configs, command lines, timing, test helpers.

Import the submodules (``from hone_core.runs import Run``); none of them loads torch until something needs it.
"""

from hone_core.lazy import lazy_names

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "cli": ["Verb", "run_cli"],
        "config": ["flag", "from_dict", "load_config", "to_dict"],
        "devices": ["check_device", "resolve_device", "resolve_dtype"],
        "environment": [],
        "errors": ["CheckpointError", "MissingExtraError", "UnsupportedHardwareError"],
        "flags": ["Flag", "flags_of"],
        "handles": ["CallState", "Handle", "Hooks", "resolve"],
        "hosts": ["HostFacts", "describe_host", "open_host", "packaged_host", "read_facts", "save_host", "write_facts"],
        "io": [
            *("atomic_path", "atomic_write_bytes", "atomic_write_json", "atomic_write_text", "read_prompts"),
            "save_safetensors",
        ],
        "lazy": [],
        "plots": ["Sheet", "drawing"],
        "progress": ["progress_bar"],
        "runs": ["Report", "Row", "Run", "export_results", "load_results"],
        "statistics": ["Paired", "bootstrap_accuracies", "bootstrap_interval", "mcnemar", "paired"],
        "testing": [],
        "timing": ["Stopwatch", "Timing", "check_values", "measure", "measure_interleaved"],
        "training": ["TrainReport", "Training", "check_budget", "finish_host"],
    },
)
