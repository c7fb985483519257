"""This file is where the server of the local backend learns, imported last, which code it holds.

Workers are forked with modules that were read when the server started. A source file that somebody
edits afterwards is not what they run, and must not be what they say they ran.
"""

from stillhouse.rundir import code_identity

code_identity()
