# Shorthand for the scripts; they need no make.
.PHONY: serve test torture
serve:
	scripts/serve
test:
	scripts/test
torture:
	.venv-dev/bin/python scripts/torture.py
