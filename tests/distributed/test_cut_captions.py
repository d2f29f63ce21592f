"""What is cut off captions is told at the end of a run, over all ranks."""

import re

from runs import train


def test_the_log_ends_with_the_tokens_that_were_cut(two_ranks, shapes, tmp_path):
    arguments = ["--outputs", str(tmp_path), "--exp-name", "run", "--max-steps", "2", "--num-workers", "0"]
    arguments += ["--t5.max-length", "6", "--dropout-ratio.t5", "0", "--ckpt-every", "0"]
    two_ranks(train, shapes.root, shapes.train_arguments(*arguments))
    log = (tmp_path / "run/log.txt").read_text()
    (found,) = re.findall(r"t5: (\d+) of (\d+) texts had more than max_length=6 tokens: (\d+) tokens were cut off", log)
    assert "clip:" not in log
    cut, seen, tokens = map(int, found)
    samples = [int(n) for n in re.findall(r'"samples": (\d+)', (tmp_path / "run/metrics.jsonl").read_text())]
    assert cut == seen == sum(samples)  # every caption of this world is longer, on either rank
    assert tokens >= 2 * cut
