# A thin front: bootstrap.py does the work, and `python3 bootstrap.py dev` does the same without make.
PYTHON = python3

setup dev web test test-full test-newest bench lint audit lock:
	@$(PYTHON) bootstrap.py $@ $(ARGS)

.PHONY: setup dev web test test-full test-newest bench lint audit lock
