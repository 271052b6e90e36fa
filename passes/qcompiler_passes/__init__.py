"""The built-in passes, as a plug-in like any other."""

from qcompiler.plugin import Plugin
from qcompiler_passes.cleanup import Cleanup

PLUGIN = Plugin("qcompiler-passes", passes=(Cleanup,))
