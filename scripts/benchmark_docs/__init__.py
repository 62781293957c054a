"""The sections of docs/benchmarks.md: one function a result file, from its JSON to Markdown."""
