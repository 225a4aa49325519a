import sys
from pathlib import Path

# Workers that tests also start in processes of their own.
sys.path.insert(0, str(Path(__file__).parent))
