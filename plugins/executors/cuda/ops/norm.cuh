// The norms of `mortice.core.model.operators.NormType`.
#pragma once

enum NormKind { kNoNorm, kRmsNorm, kLayerNorm };
