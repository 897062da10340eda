//! Messages of `proto/containerd`, and how they are wrapped.

use std::time::SystemTime;

use prost_types::{Any, Timestamp};

macro_rules! package {
    ($name:ident) => {
        #[allow(missing_docs, unused_qualifications, dead_code, reason = "generated")]
        pub mod $name {
            include!(concat!(
                env!("OUT_DIR"),
                "/edgevmm.containerd.",
                stringify!($name),
                ".rs"
            ));
        }
    };
}

package!(task);
package!(ttrpc);
package!(events);
package!(bootstrap);
package!(metrics);

/// Packs a message that containerd knows by `name`, in the way that containerd itself does it:
/// without a host before the name.
pub fn any(name: &str, message: &impl prost::Message) -> Any {
    Any {
        type_url: name.to_owned(),
        value: message.encode_to_vec(),
    }
}

/// The present time.
pub fn now() -> Timestamp {
    SystemTime::now().into()
}
