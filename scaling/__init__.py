import sys

if sys.argv[:1] == ["-m"]:  # a command of this room starts: an interrupt while Python imports is no traceback
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
