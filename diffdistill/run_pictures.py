"""What a run shows: grids of samples, small ones that it keeps for its report, and the report."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from diffdistill import ranks
from diffdistill.compiling import uncompiled
from diffdistill.pictures import MOST_CLASSES, MOST_CLIPS, draw_picture
from diffdistill.recipe import Recipe
from diffdistill.report import or_tell, write_run_report
from diffdistill.run_folder import RunFolder, say
from diffdistill.small_samples import SameNoise, keep_same_noise, keep_step, same_noise
from diffdistill.stopping import StopRequested


class RunPictures:
    """Of the run in `folder`. All processes draw, together; the main one writes."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.keeping = True

    @uncompiled()
    def grid(self, step: int) -> Path:
        """Draw samples of the networks as they are, with a fixed seed, into samples/step-N.png."""
        data, networks = self.recipe.data, self.recipe.networks
        images = 8 * min(data.num_classes or 8, MOST_CLASSES)
        num = {1: 2000, 4: MOST_CLIPS}.get(len(data.shape), images)
        path = self.folder.path / "samples" / f"step-{step:08d}.png"
        draw_picture(data, self.recipe.distiller.generator, num, 0, path, networks)
        return path

    @uncompiled()
    def keep(self, step: int) -> None:
        """Keep a few samples for the report. A run outlives its pictures: what goes wrong here is told, once."""
        if not self.keeping:
            return
        networks = self.recipe.networks
        networks.train_only(())  # no dropout; the next phase chooses its own
        kept = True
        try:
            with networks.averaged():
                keep_step(self.folder.path, step, self.recipe.data, self.recipe.distiller.generator, networks)
        except (RuntimeError, ValueError, OSError) as error:
            kept = False
            say(f"no more samples are kept for report.html: {str(error).splitlines()[0]}")
        self.keeping = not ranks.any_of(not kept)

    @uncompiled()
    def report(self, step: int, at_once: AbstractContextManager[None]) -> None:
        """Write report.html of a run that is finished, and stays so whatever happens here.

        at_once: where a signal ends long work.
        """
        try:
            with or_tell(self.folder.path), at_once:
                with self.recipe.networks.averaged():
                    drawn = same_noise(step, self.recipe)
                ranks.on_main(lambda: self._write(drawn))
        except StopRequested:
            say(f"no report.html was written: stopped before. diffdistill report run={self.folder.path} writes it.")

    def _write(self, drawn: SameNoise) -> None:
        keep_same_noise(self.folder.path, drawn)
        write_run_report(self.folder)
