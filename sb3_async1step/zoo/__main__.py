"""``python -m sb3_async1step.zoo`` is the same as ``sb3-async1step``."""

from sb3_async1step.zoo.cli import main

if __name__ == "__main__":
    main()
