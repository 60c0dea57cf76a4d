"""temporary"""
import time, os
from dataclasses import dataclass
import numpy as np, torch
from .augment import NUM_UNIFORMS
from .counter_random import uniforms
from .images import ImageError
from ..cache.errors import InputError
@dataclass(frozen=True)
class Batch:
    step:int; rows:object; images:tuple; targets:object; sentences:object; bank:object; wait_s:float
class BatchLoader:
    def __init__(self, images, image_stream, pixels, views, view_key, sentences=None, bank=None, workers=0, pin_memory=False):
        self.__dict__.update(locals()); self.num_workers=2
    def __enter__(self): return self
    def __exit__(self,*a): pass
    def batches(self, first, end):
        for step in range(first,end):
            t=time.perf_counter()
            d=self.image_stream.draw(step)
            nums=uniforms(self.view_key,d.rows,d.passes,NUM_UNIFORMS).tolist()
            ims=[]
            for v in self.views:
                try: ims.append(torch.from_numpy(np.stack([v.view(self.pixels.read(k),n) for k,n in zip(self.pixels.tickets(d.rows),nums)])))
                except ImageError as e: raise InputError(f"can no longer be used ({e})") from e
            tt=torch.from_numpy(self.images.embeddings[d.rows])
            s=None if self.sentences is None else torch.from_numpy(self.sentences[0].embeddings[self.sentences[1].draw(step).rows])
            b=None if self.bank is None else torch.from_numpy(self.images.embeddings[self.bank.draw(step).rows])
            yield Batch(step,d.rows,tuple(ims),tt,s,b,time.perf_counter()-t)
def normalise(images, mean, std):
    return ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
