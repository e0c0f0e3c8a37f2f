"""The memory table on peaks that can be checked by hand, and what each cell is told to run."""

from pathlib import Path

from memory_rows import PAPER, Args, command, table
from reporting.cells import CellName


def test_each_peak_stands_beside_its_share_of_the_full_run_and_beside_the_papers():
    rows = [
        {
            "selector": cell.selector,
            "retention": cell.retention,
            "memory": mode,
            "peak_gib": 2.0 if mode == "fused" else 2.0 + 2.0 * cell.retention,
        }
        for cell in PAPER.cells
        for mode in ("whole", "fused")
    ]
    found = {row[0]: row[1:] for row in table(rows).rows}
    assert list(found) == ["all", *(f"entropy_sample {r} %" for r in (50, 20, 10)), "q3 20 %", "q3 10 %"]
    # 2 + 2·0.5 = 3 GiB of 4: 75 %. Paper: Qwen3 38.1 of 72.0 GB = 53 %, Llama 32.1 of 41.6 = 77 %, Qwen2.5 19.7 of 35.8
    assert found["entropy_sample 50 %"] == [
        "3.00",
        "75 %",
        "2.00",
        "100 %",
        "38.1",
        "53 %",
        "32.1",
        "77 %",
        "19.7",
        "55 %",
    ]
    # Table 4, Qwen3: 36.2 of 72.0 = 50 %
    assert found["q3 10 %"][:6] == ["2.20", "55 %", "2.00", "100 %", "36.2", "50 %"]


def test_a_step_is_one_micro_batch_and_further_flags_go_to_every_cell():
    args = Args(Path("out"), "s", "t", "p.jsonl", prompts_per_step=4, max_new_tokens=1000)
    words = command(args, CellName("q3", 0.2), "whole", Path("out/run"), ["--prompt_format", "raw"])
    flags = dict(zip(words[4::2], words[5::2], strict=True))
    assert flags["--engine.micro_batch_tokens"] == str(4 * (1000 + 512))
    assert (flags["--select.by"], flags["--select.retention"], flags["--loss.memory"]) == ("q3", "0.2", "whole")
    assert flags["--prompt_format"] == "raw"
