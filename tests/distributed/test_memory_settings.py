"""Settings of activation memory change what a run keeps, and no number that it computes."""

from runs import numbers, train

CHECKPOINT = ["--grad-checkpoint", "True"]
SETTINGS = {
    "plain": ["--grad-checkpoint", "False"],
    "full": [*CHECKPOINT, "--grad-ckpt-policy", "full"],
    "double": [*CHECKPOINT, "--grad-ckpt-settings", "(1,0)"],
    "attention": [*CHECKPOINT, "--grad-ckpt-policy", "attention"],
    "offload": [*CHECKPOINT, "--grad-ckpt-buffer-size", "10_000_000"],
    "some": [*CHECKPOINT, "--grad-ckpt-buffer-size", "20_000", "--grad-ckpt-policy", "attention"],
}


def test_memory_settings_change_no_number(one_rank, shapes, tmp_path):
    """Two updates of two micro-batches, of images and videos."""
    common = ["--outputs", str(tmp_path), "--max-steps", "2", "--accumulation-steps", "2", "--num-workers", "0"]
    for name, settings in SETTINGS.items():
        one_rank(train, shapes.root, shapes.train_arguments(*common, *settings, "--exp-name", name))
    expected = numbers(tmp_path / "plain")
    assert len(expected) == 2
    assert all(numbers(tmp_path / name) == expected for name in SETTINGS)
    assert "is full" in (tmp_path / "some/log.txt").read_text()
    assert "is full" not in (tmp_path / "offload/log.txt").read_text()
