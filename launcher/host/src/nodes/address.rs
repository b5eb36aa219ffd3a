//! Where node 0 listens for the others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, ToSocketAddrs};

/// Where node 0 listens so that others reach it at `master_addr`: at all its addresses, of IPv6 where the name has no
/// other.
pub fn any_address(master_addr: &str, port: u16) -> IpAddr {
    let mut found = (master_addr, port).to_socket_addrs().into_iter().flatten().peekable();
    match found.peek().is_some() && found.all(|at| is_ipv6_alone(at.ip())) {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    }
}

/// Where the launcher of node 0 listens for the others: at the address of `master_addr` where that is one of this machine, else at
/// all (a name that leads here through a translation of addresses).
pub fn listening_address(master_addr: &str, port: u16) -> IpAddr {
    let found = (master_addr, port).to_socket_addrs().into_iter().flatten();
    // A port of its own, since the one that is asked for may be taken, which is to be said of it.
    let is_here = |at: &IpAddr| TcpListener::bind((*at, 0)).is_ok();
    let all = any_address(master_addr, port);
    let usable = found.map(|at| at.ip()).filter(|at| !at.is_loopback() || master_addr_is_loopback(master_addr));
    usable.filter(|at| at.is_ipv4() == all.is_ipv4()).find(is_here).unwrap_or(all)
}

/// A name of this host that resolves to loopback, as Debian's /etc/hosts has it, means its other addresses.
fn master_addr_is_loopback(name: &str) -> bool {
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|at| at.is_loopback())
}

/// Not an address of IPv4 in the form of IPv6, which sockets of IPv4 serve.
fn is_ipv6_alone(at: IpAddr) -> bool {
    matches!(at, IpAddr::V6(at) if at.to_ipv4_mapped().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_0_listens_where_its_address_can_be_reached() {
        let at = |addr| any_address(addr, 29500).to_string();
        assert_eq!(
            ["127.0.0.1", "", "no such name", "::ffff:127.0.0.1", "::1", "fe80::1"].map(at),
            ["0.0.0.0", "0.0.0.0", "0.0.0.0", "0.0.0.0", "::", "::"]
        );
    }

    #[test]
    fn launchers_meet_at_the_address_that_is_named_where_it_is_of_this_machine() {
        let at = |addr| listening_address(addr, 29500).to_string();
        assert_eq!(
            ["127.0.0.1", "localhost", "192.0.2.7", "no such name"].map(at),
            ["127.0.0.1", "127.0.0.1", "0.0.0.0", "0.0.0.0"]
        );
    }
}
