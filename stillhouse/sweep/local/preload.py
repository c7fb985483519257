"""Compute the code identity in the server of the local backend, which imports this module last.

Workers are forked with modules that were read when the server started. A source file that somebody
edits afterwards is not what they run, and must not be recorded as what they ran.
"""

from stillhouse.rundir import code_identity

code_identity()
