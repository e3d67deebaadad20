"""The list of pytest plugins, nothing else."""

pytest_plugins = [
    "pytester",
    "fixtures.gpus",
    "fixtures.options",
    "fixtures.spreading",
    "fixtures.checkpoints",
    "fixtures.engines_under_test",
    "fixtures.speech_under_test",
    "fixtures.sensitivity_under_test",
    "fixtures.once_per_run",
    "fixtures.memory_under_test",
    "fixtures.serving_under_test",
    "fixtures.throughput_under_test",
    "fixtures.settings_under_test",
    "fixtures.verifying",
    "fixtures.expected",
    "reports.plugin",
]
