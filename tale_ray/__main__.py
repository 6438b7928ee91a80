"""`python -m tale_ray` is `tale-ray`."""

from tale_ray.cli import main

if __name__ == "__main__":
    main()
