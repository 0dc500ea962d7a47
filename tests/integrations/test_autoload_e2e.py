"""RF8 checkpoints in plain scripts: with the package installed they load, without it they are refused.

Every script runs in a new process, in a folder of its own, and never imports `hf_gg` by itself; the package is
"installed" by its entry point in a `.dist-info` folder on `PYTHONPATH`.
"""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from hf_gg import GGConfig, quantize_


ROOT = Path(__file__).parents[2]
TEXT = "Half a byte is not enough, and two are too many. "

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
ODD = {"hidden_size": 30, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
NO_LINEAR = [".*self_attn.*", ".*mlp.*"]

# name of a checkpoint: the model, the arguments of GGConfig, and what the name of every tensor of codes holds
REFUSED: dict[str, tuple[PreTrainedConfig, dict, str]] = {
    "llama": (LlamaConfig(**SIZES), {}, "_proj.weight"),
    "odd widths": (LlamaConfig(**{**SIZES, **ODD}), {}, "_proj.weight"),
    "one feature": (
        LlamaConfig(**{**SIZES, "intermediate_size": 1}),
        {"modules_to_not_convert": [".*self_attn.*"]},
        "mlp",
    ),
    "experts only": (
        MixtralConfig(**SIZES, num_local_experts=4),
        {"modules_to_not_convert": [".*self_attn.*"]},
        "experts",
    ),
    "coded": (LlamaConfig(**SIZES), {"coding": "rans"}, "_proj.weight"),
    "coded experts": (
        MixtralConfig(**SIZES, num_local_experts=4),
        {"coding": "eg0", "modules_to_not_convert": [".*self_attn.*"]},
        "experts",
    ),
    "Conv1D": (GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64), {}, ".c_"),
    "Conv1D of one": (GPT2Config(vocab_size=257, n_embd=1, n_layer=1, n_head=1, n_positions=64, n_inner=1), {}, ".c_"),
    "embeddings only": (
        LlamaConfig(**SIZES),
        {"quantize_embeddings": True, "modules_to_not_convert": NO_LINEAR},
        "embed_tokens",
    ),
    "tied embeddings only": (
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        {"quantize_embeddings": True, "quantize_lm_head": True, "modules_to_not_convert": NO_LINEAR},
        "embed_tokens",
    ),
}


class Workplace:
    """A folder with checkpoints of one tiny Llama, and the processes that use them.

    Attributes:
        plain: the model in full precision, with a tokenizer.
        rf8: the same in RF8, with the tokenizer.
        model: what `rf8` holds, in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.plain, self.rf8 = path, path / "plain", path / "rf8"
        tokenizer = byte_tokenizer()
        self.model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
        self.model.save_pretrained(self.plain)
        quantize_(self.model, GGConfig())
        self.model.save_pretrained(self.rf8)
        for folder in (self.plain, self.rf8):
            tokenizer.save_pretrained(folder)
        self.site = path / "site"
        info = self.site / "hf_gg-0.1.0.dist-info"
        info.mkdir(parents=True)
        declared = re.search(
            r'^\[project\.entry-points\."(.+)"\]\n(.+) = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
        )
        assert declared is not None
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-gg\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*declared.groups()))

    def run(self, *command: str, installed: bool = True) -> str:
        """Runs python with arguments, fails where it fails, and returns its standard output."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_GG")}
        environment.pop("PYTHONPATH", None)
        if installed:
            environment["PYTHONPATH"] = os.pathsep.join([str(self.site), str(ROOT)])
        else:
            environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        finished = subprocess.run(
            [sys.executable, *command],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        assert "hf_gg could not register" not in finished.stderr
        return finished.stdout

    def script(self, code: str, installed: bool = True) -> str:
        """Writes a script and runs it; it starts with nothing imported, and may use the folder's names."""
        file = self.path / "script.py"
        names = f"PLAIN, RF8 = {str(self.plain)!r}, {str(self.rf8)!r}\n"
        file.write_text(names + textwrap.dedent(code))
        return self.run(str(file), installed=installed)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the end of the text, 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: code for code, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    torch.manual_seed(0)
    return Workplace(tmp_path_factory.mktemp("autoload"))


def test_auto_model(workplace: Workplace):
    """Loading RF8, and quantizing as a command line or a YAML file asks for it: with a dict."""
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.save(workplace.model(tokens).logits, workplace.path / "logits.pt")
    workplace.script("""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(RF8)
        layer = model.model.layers[0].mlp.up_proj
        assert type(layer).__name__ == "RF8Linear" and layer.weight.dtype == torch.uint8
        with torch.no_grad():
            assert torch.equal(model(torch.arange(12)[None]).logits, torch.load("logits.pt"))

        config = {"quant_method": "gg", "weight_format": "rf8x"}
        model = AutoModelForCausalLM.from_pretrained(PLAIN, quantization_config=config)
        assert model.model.layers[0].mlp.up_proj.format == "rf8x"
        assert model.config.quantization_config.quant_method == "gg"
    """)


def test_registry_imported_first(workplace: Workplace):
    """Its own import is what imports torch, so that it is half executed when torch calls the entry point."""
    workplace.script("""
        from transformers.quantizers.auto import AutoQuantizationConfig
        assert AutoQuantizationConfig.from_dict({"quant_method": "gg"}).weight_format == "rf8"
    """)


def test_pipeline(workplace: Workplace):
    inputs = byte_tokenizer()(TEXT, return_tensors="pt")
    expected = workplace.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    written = workplace.script(f"""
        from transformers import pipeline
        write = pipeline("text-generation", RF8)
        [result] = write({TEXT!r}, max_new_tokens=8, do_sample=False, return_tensors=True)
        assert type(write.model.model.layers[0].mlp.up_proj).__name__ == "RF8Linear"
        print(result["generated_token_ids"])
    """)
    assert json.loads(written) == expected.tolist()


def test_adapter(workplace: Workplace):
    """PEFT is imported first: it imports torch and Transformers itself, and finds the base model in the adapter."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(workplace.rf8, quantization_config=GGConfig(dequantize=True))
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(workplace.rf8)
    adapted.save_pretrained(workplace.path / "adapter")
    with torch.no_grad():
        torch.save(adapted(torch.arange(12)[None]).logits, workplace.path / "adapted.pt")
    workplace.script("""
        from peft import AutoPeftModelForCausalLM, PeftModel
        import torch
        from transformers import AutoModelForCausalLM
        for model in (
            AutoPeftModelForCausalLM.from_pretrained("adapter"),
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(RF8), "adapter"),
        ):
            assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "RF8Linear"
            with torch.no_grad():
                torch.testing.assert_close(model(torch.arange(12)[None]).logits, torch.load("adapted.pt"))
    """)


@pytest.mark.slow
def test_lm_eval_command(workplace: Workplace):
    """`lm_eval --model hf` with a task of its own: perplexity, byte by byte, of one line."""
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    tasks = workplace.path / "tasks"
    tasks.mkdir()
    (tasks / "line.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tasks / "line.yaml").write_text(
        textwrap.dedent(f"""
            task: one_line
            dataset_path: json
            dataset_kwargs:
              data_files:
                test: {tasks / "line.jsonl"}
            output_type: loglikelihood_rolling
            test_split: test
            doc_to_text: ""
            doc_to_target: "{{{{text}}}}"
            metric_list:
              - metric: bits_per_byte
        """)
    )
    workplace.run(
        *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={workplace.rf8},dtype=float32"),
        *("--tasks", "one_line", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "1"),
        *("--output_path", str(workplace.path / "results")),
    )
    [file] = (workplace.path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())
    tokens = byte_tokenizer()("<end>" + TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = workplace.model(tokens, labels=tokens).loss.item()
    measured = results["results"]["one_line"]["bits_per_byte,none"]
    assert measured == pytest.approx(nats / math.log(2), rel=1e-4)


def test_refused_without_the_package(workplace: Workplace):
    """Transformers alone must not take codes for weights; told to ignore sizes, it must not use a single code."""
    codes = {}
    for name, (config, options, part) in REFUSED.items():
        folder = workplace.path / "refused" / name
        quantize_(AutoModelForCausalLM.from_config(config), GGConfig(**options)).save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = [key for key in file.keys() if file.get_slice(key).get_dtype() == "U8"]  # noqa: SIM118
        assert names, name
        assert all(part in key for key in names), (name, names)
        codes[str(folder)] = len(names)
    workplace.script(
        f"""
        import sys
        from transformers import AutoModelForCausalLM, logging
        logging.set_verbosity_error()
        for folder, codes in {codes}.items():
            try:
                AutoModelForCausalLM.from_pretrained(folder)
            except RuntimeError as error:
                assert "ignore_mismatched_sizes" in str(error), folder
            else:
                raise SystemExit(f"{{folder}}: loaded")

            model, info = AutoModelForCausalLM.from_pretrained(
                folder, ignore_mismatched_sizes=True, output_loading_info=True
            )
            assert len(info["mismatched_keys"]) == codes, folder
            for name, *_ in info["mismatched_keys"]:
                assert model.get_parameter(name).abs().max() < 1, (folder, name)
        assert not any(name.startswith("hf_gg") for name in sys.modules)
        """,
        installed=False,
    )
