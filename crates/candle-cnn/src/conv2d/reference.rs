//! The definition, as plain loops in f64: what the fast path is checked against.
//!
//! Legend: n image, k output channel, c input channel, (oh, ow) output pixel,
//! (r, s) tap, (ih, iw) input pixel.

use super::Conv2dGeometry;

/// `y[n,k,oh,ow] = bias[k] + Σ_{c,r,s} x[n,c,ih,iw] · weight[k,c,r,s]`.
///
/// All slices are contiguous, in the layouts (N, C, H, W), (K, C, R, S), (K).
///
/// # Panics
/// When a slice is shorter than the geometry says.
pub fn conv2d_reference(
    geometry: &Conv2dGeometry,
    x: &[f64],
    weight: &[f64],
    bias: Option<&[f64]>,
) -> Vec<f64> {
    let (h_out, w_out) = geometry.output;
    let mut y = vec![0.0; geometry.batch * geometry.c_out * h_out * w_out];
    if let Some(bias) = bias {
        for (i, y) in y.iter_mut().enumerate() {
            *y = bias[i / (h_out * w_out) % geometry.c_out];
        }
    }
    for_each_product(geometry, |y_at, x_at, weight_at| {
        y[y_at] += x[x_at] * weight[weight_at];
    });
    y
}

/// The gradients of input, weight and bias for the upstream gradient `dy`.
///
/// # Panics
/// When a slice is shorter than the geometry says.
pub fn conv2d_backward_reference(
    geometry: &Conv2dGeometry,
    x: &[f64],
    weight: &[f64],
    dy: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut dx = vec![0.0; x.len()];
    let mut dweight = vec![0.0; weight.len()];
    let mut dbias = vec![0.0; geometry.c_out];
    let pixels = geometry.output.0 * geometry.output.1;
    for (i, dy) in dy.iter().enumerate() {
        dbias[i / pixels % geometry.c_out] += dy;
    }
    for_each_product(geometry, |y_at, x_at, weight_at| {
        dx[x_at] += dy[y_at] * weight[weight_at];
        dweight[weight_at] += dy[y_at] * x[x_at];
    });
    (dx, dweight, dbias)
}

/// Calls `f(output index, input index, weight index)` for every product in the sum.
fn for_each_product(geometry: &Conv2dGeometry, mut f: impl FnMut(usize, usize, usize)) {
    let Conv2dGeometry {
        batch,
        c_in,
        input,
        c_out,
        kernel,
        output,
        config,
    } = *geometry;
    let source = |o: usize, tap: usize, stride: usize, dilation: usize, padding: usize, size| {
        (o * stride + tap * dilation)
            .checked_sub(padding)
            .filter(|&i| i < size)
    };
    for n in 0..batch {
        for k in 0..c_out {
            for oh in 0..output.0 {
                for ow in 0..output.1 {
                    let y_at = ((n * c_out + k) * output.0 + oh) * output.1 + ow;
                    for r in 0..kernel.0 {
                        let ih = source(
                            oh,
                            r,
                            config.stride.0,
                            config.dilation.0,
                            config.padding.0,
                            input.0,
                        );
                        let Some(ih) = ih else { continue };
                        for s in 0..kernel.1 {
                            let iw = source(
                                ow,
                                s,
                                config.stride.1,
                                config.dilation.1,
                                config.padding.1,
                                input.1,
                            );
                            let Some(iw) = iw else { continue };
                            for c in 0..c_in {
                                let x_at = ((n * c_in + c) * input.0 + ih) * input.1 + iw;
                                let weight_at = ((k * c_in + c) * kernel.0 + r) * kernel.1 + s;
                                f(y_at, x_at, weight_at);
                            }
                        }
                    }
                }
            }
        }
    }
}
