# Shorthand for the scripts; they need no make.
.PHONY: serve test
serve:
	scripts/serve
test:
	scripts/test
